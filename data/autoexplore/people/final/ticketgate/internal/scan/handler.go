// Package scan answers the hand scanners.
package scan

import (
	"net/http"

	"ticketgate/internal/code"
)

// Handler returns 200 for a valid ticket, 409 if it was used, 410 if refunded.
func Handler(dsn string) http.Handler {
	store := open(dsn)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text := r.FormValue("code")
		// No query for codes that cannot exist.
		if !code.Valid(text) {
			w.WriteHeader(404)
			return
		}
		w.WriteHeader(store.Use(r.Context(), text))
	})
}
