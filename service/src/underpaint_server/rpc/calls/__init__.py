"""What happens around every call: errors, metrics, log line, shared work, repeated request ids."""
