"""The algebra of ΔW = B · A on its factors, in float64; B · A is never formed as a whole."""
