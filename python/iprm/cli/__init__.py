"""The command `iprm`: one file per command."""
