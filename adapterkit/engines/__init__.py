"""What serving engines do with an adapter, as data, and the verdict that follows."""
