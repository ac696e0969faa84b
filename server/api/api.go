// Package api serves the public gRPC API: SessionService, NodeService and
// StorageService. It validates, stores what users ask for, and shows what is; it
// never waits for a node to do anything, but for what a user asks of a node itself:
// logs, files, a checkpoint.
package api

import (
	"context"
	"iter"
	"log/slog"
	"time"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/storage"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// Events gives what happens in a session.
type Events interface {
	// Subscribe yields events behind `after` (an event id, or empty for from now
	// on) until ctx ends, or the session is deleted (then an end event is last).
	// An error is yielded once, last: fleet.ErrNotFound, fleet.ErrInvalidArgument
	// for an `after` that is no event id.
	Subscribe(ctx context.Context, sessionID, after string) iter.Seq2[*cloudcodev1.SessionEvent, error]
}

// Agents reaches node daemons.
type Agents interface {
	// Agent returns a client of the node daemon. Calls on it fail with UNAVAILABLE
	// while the node is not linked.
	Agent(ctx context.Context, nodeID string) (nodev1.AgentServiceClient, error)
}

// Config of the services. Store is needed; what else is missing is left out of
// what they show.
type Config struct {
	Store        store.Store
	Events       Events
	Agents       Agents
	Storage      *storage.Storage              // nil: the server has no object storage of its own
	DefaultImage string                        // for sessions that name none
	WebURI       func(sessionID string) string // where browsers find a session; "" if unknown
	Heartbeat    func(nodeID string) time.Time // the newest one heard; zero if unknown
	Log          *slog.Logger
}

// Sessions serves SessionService.
type Sessions struct {
	cloudcodev1.UnimplementedSessionServiceServer
	config Config
}

// Nodes serves NodeService.
type Nodes struct {
	cloudcodev1.UnimplementedNodeServiceServer
	config Config
}

// Storages serves StorageService.
type Storages struct {
	cloudcodev1.UnimplementedStorageServiceServer
	sessions *Sessions
}

// New returns the services. They return the errors of fleet; see Status.
func New(c Config) (*Sessions, *Nodes, *Storages) {
	if c.WebURI == nil {
		c.WebURI = func(string) string { return "" }
	}
	if c.Heartbeat == nil {
		c.Heartbeat = func(string) time.Time { return time.Time{} }
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Storage == nil {
		c.Storage = storage.New(storage.Config{Store: c.Store, Logger: c.Log})
	}
	sessions := &Sessions{config: c}
	return sessions, &Nodes{config: c}, &Storages{sessions: sessions}
}
