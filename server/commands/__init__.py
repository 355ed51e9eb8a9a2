"""The commands of the `cadenza` program, one module each. Heavy imports wait until a command runs."""
