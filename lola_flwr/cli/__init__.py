"""The ``lola-flwr`` command: one module a command, gathered in `lola_flwr.cli.main`."""
