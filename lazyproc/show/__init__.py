"""Events, findings, reports and checkpoints as text and as what `--json` prints; knows neither kernel nor messages."""
