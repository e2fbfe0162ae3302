"""The profiles: one TOML file each, read by mcar_lib.runs.load_profile."""
