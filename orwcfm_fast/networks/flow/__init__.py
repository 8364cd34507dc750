"""Any flow pipeline of diffusers as a velocity network, without code for any family."""
