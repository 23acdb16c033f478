"""`make storm`: a tiny run is disturbed at random moments, again and again, and must end as the undisturbed one did."""
