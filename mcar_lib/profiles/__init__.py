"""The profiles: one TOML file each, read by mcar_lib.experiment.load_profile."""
