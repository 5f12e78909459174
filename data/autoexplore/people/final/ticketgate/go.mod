module ticketgate

go 1.21

require (
	example.org/pgx/v5 v5.4.3
)
