"""The engine process: each job is a generator of rows, and rows of several jobs share forward passes."""
