// Command gate serves the door API.
package main

import (
	"context"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"ticketgate/internal/scan"
)

func main() {
	// Requests in flight get 20 seconds when the pod is stopped.
	const grace = 20 * time.Second
	server := &http.Server{Addr: ":8080", Handler: scan.Handler(os.Getenv("DB"))}
	go server.ListenAndServe()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	<-stop
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	server.Shutdown(ctx)
}
