package scan

import (
	"context"
	"database/sql"

	_ "example.org/pgx/v5/stdlib"
)

// The pool has 8 connections, because Postgres is shared with billing.
const poolSize = 8

type Store struct{ db *sql.DB }

func open(dsn string) *Store {
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		panic(err)
	}
	db.SetMaxOpenConns(poolSize)
	return &Store{db}
}

// Use marks a ticket as used in one UPDATE, so that two doors cannot both let it in.
func (s *Store) Use(ctx context.Context, code string) int {
	var refunded bool
	row := s.db.QueryRowContext(ctx, "UPDATE ticket SET used_at = now() WHERE code = $1 AND used_at IS NULL RETURNING refunded", code)
	switch err := row.Scan(&refunded); {
	case err == sql.ErrNoRows:
		return 409
	case err != nil:
		return 503
	case refunded:
		return 410
	}
	return 200
}
