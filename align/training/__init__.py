"""What sft.py and dpo.py are made of."""
