"""Looking at datasets and checking them."""
