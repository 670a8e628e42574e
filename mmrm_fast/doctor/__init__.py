"""What is here, and whether it computes right and how fast."""
