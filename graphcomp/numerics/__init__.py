"""Comparing what two models compute: tolerances, float64, random ops made certain, outputs that prove nothing."""
