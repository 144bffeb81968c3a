"""Write a report from run records: tables, figures and an HTML page. Never imports torch."""
