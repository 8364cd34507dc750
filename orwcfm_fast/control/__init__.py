"""What watches over a run: the guard, the controllers of α and τ, memory."""
