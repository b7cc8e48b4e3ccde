"""From messages to drafts of jobs."""
