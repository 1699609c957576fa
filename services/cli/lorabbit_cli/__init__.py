"""The operator's side: the `lorabbit` command."""
