"""What an exported folder holds beside the Hugging Face model, and how far each part is from it."""
