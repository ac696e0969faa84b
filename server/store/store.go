// Package store keeps the fleet's state. One implementation is a package below
// this one; each passes the conformance suite in storetest.
package store

import (
	"context"
	"iter"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// Revision counts committed transactions that changed something, from 1.
type Revision uint64

// Store is a transactional store with a change feed.
type Store interface {
	// View runs fn on one consistent snapshot.
	View(ctx context.Context, fn func(ReadTx) error) error
	// Update runs fn in a read-write transaction and returns once it is on
	// disk. An error from fn rolls back and is returned. fn may run more than
	// once: it must have no side effects outside the transaction. Returns
	// fleet.ErrResourceExhausted when the disk is full; then nothing is written.
	// A fn that writes nothing gets the revision of what it has read.
	Update(ctx context.Context, fn func(Tx) error) (Revision, error)
	// Watch yields every change committed after a revision, in order, until ctx
	// ends; all changes of one transaction have the same revision. When the
	// changes right behind `after` are no longer held it yields
	// fleet.ErrStale once and ends: read everything with View and watch again
	// from that snapshot's revision. After Close it yields fleet.ErrUnavailable
	// once and ends.
	Watch(ctx context.Context, after Revision) iter.Seq2[Change, error]
	// Close waits for what runs. Later calls return fleet.ErrUnavailable.
	Close() error
}

// Change says that something was written. Exactly one of the pointers is set
// for a write; after a removal all are nil and ID says what is gone. Watchers
// share what the pointers point at: Clone before you change it.
type Change struct {
	Revision Revision
	Kind     Kind
	ID       string
	Session  *fleet.Session
	Node     *fleet.Node
	Event    *fleet.LifecycleEvent // Kind is KindEvent; ID is the session's id
}

// Kind of thing that changed.
type Kind string

// Kinds of things.
const (
	KindSession Kind = "session"
	KindNode    Kind = "node"
	KindEvent   Kind = "event"
)

// ReadTx reads. What it returns is the caller's own copy.
type ReadTx interface {
	// Revision of the snapshot.
	Revision() Revision
	// Session returns fleet.ErrNotFound if there is none.
	Session(id string) (*fleet.Session, error)
	// Sessions yields sessions with an id greater than after, by id.
	Sessions(after string) iter.Seq2[*fleet.Session, error]
	// Node returns fleet.ErrNotFound if there is none.
	Node(id string) (*fleet.Node, error)
	Nodes(after string) iter.Seq2[*fleet.Node, error]
	// Events yields the stored lifecycle events of a session with a sequence
	// number greater than after; the oldest are dropped (see EventsKept).
	Events(sessionUID string, after uint64) iter.Seq2[*fleet.LifecycleEvent, error]
	// Request returns what was stored under an idempotency key, or fleet.ErrNotFound.
	Request(key string) (Request, error)
}

// EventsKept is how many lifecycle events of one session are kept at most; fewer
// where they are large.
const EventsKept = 1000

// Request remembers an answered create: its fingerprint and the session it made.
type Request struct {
	Fingerprint string `json:"fingerprint"`
	SessionID   string `json:"session_id"`
	SessionUID  string `json:"session_uid"`
	UnixSeconds int64  `json:"unix_seconds"` // of the create; requests are forgotten after a day
}

// Tx reads and writes. Put sets Revision on what it is given and stores a copy.
type Tx interface {
	ReadTx
	PutSession(*fleet.Session) error
	// DeleteSession removes the session and its events. Returns fleet.ErrNotFound.
	DeleteSession(id string) error
	PutNode(*fleet.Node) error
	// AppendEvent stores the session as its next lifecycle event (without the
	// password) and returns the event's sequence number.
	AppendEvent(s *fleet.Session) (uint64, error)
	PutRequest(key string, r Request) error
}
