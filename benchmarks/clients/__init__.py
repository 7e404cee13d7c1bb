"""Every client with every kind of package: the same tokens, refused, or a difference whose cause is checked."""
