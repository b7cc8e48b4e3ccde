"""From request messages to drafts of jobs and operations."""
