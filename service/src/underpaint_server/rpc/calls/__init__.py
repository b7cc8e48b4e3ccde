"""What happens around every call: the interceptor, its record, shared calls and idempotency."""
