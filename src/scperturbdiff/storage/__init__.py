"""Files: what a saved model is made of, and writing that leaves the old file whole when it fails."""
