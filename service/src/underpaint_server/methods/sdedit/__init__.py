"""SDEdit: add noise, denoise with the target prompt (Meng et al., ICLR 2022)."""
