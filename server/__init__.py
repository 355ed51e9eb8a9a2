"""HTTP in, server-sent events out: protocol models, routes, errors, metrics, command line."""
