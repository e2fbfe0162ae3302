"""The notebooks run headless: once each under a profile, in place, or into a scratch folder to be compared."""
