"""Every trait that an adapter can have against every command: traits.toml says what is right."""
