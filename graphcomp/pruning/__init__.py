"""What to remove, and removing it: saliency, allocation, the mask pass, the slice pass."""
