"""What other inference engines need to serve the models of this package."""
