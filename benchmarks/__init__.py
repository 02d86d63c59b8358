"""One question a script; each prints a table and, with `--json`, writes its figures."""
