"""Teachers: one contract, `denoised(x_t, t, cond)`, and one small file per family."""
