"""`make citizen`: an exported folder among the libraries that its users have, check by check."""
