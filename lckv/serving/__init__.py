"""What other inference engines need to serve the models of this package, and hints on what they may share."""
