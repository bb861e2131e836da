"""Where the package meets the libraries that drive training."""
