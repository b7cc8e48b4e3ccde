"""Who may have the device, and when: jobs become generators, their rows share forward passes."""
