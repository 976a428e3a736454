"""LyCORIS LoHa and LoKr."""
