# Installs depth-lab from this folder alone, without a network:
#   powershell -ExecutionPolicy Bypass -File install.ps1 [NEW FOLDER]
$version = "none"
foreach ($candidate in "py -@PYTHON@", "python", "python3") {
    $program = ($candidate -split " ")[0]
    $first = @($candidate -split " " | Select-Object -Skip 1) # "-@PYTHON@" for py, nothing for the others
    if (-not (Get-Command $program -ErrorAction SilentlyContinue)) { continue }
    $version = & $program @first -c "import sys; print('%d.%d' % sys.version_info[:2])" 2>$null
    if ($version -eq "@PYTHON@") {
        & $program @first (Join-Path $PSScriptRoot "install.py") @args
        exit $LASTEXITCODE
    }
}
Write-Host "error: these packages need Python @PYTHON@ (found: $version). Install it from python.org, or pack a folder"
Write-Host "with your Python; depth-lab needs 3.11 or later."
exit 1
