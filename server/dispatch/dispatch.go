// Package dispatch serves the nodes: it keeps who is registered and whose lease
// has ended, tells each node what to run, and stores what they report.
//
//	d := dispatch.New(dispatch.Config{Store: db, Gateways: routes, Identify: nodeID, Logger: log})
//	nodev1.RegisterDispatchServiceServer(grpcServer, d)
//	go d.Run(ctx)            // needed: calls wait until it has read the store
//	d.HeartbeatTime(nodeID)  // for the API
//
// # Leases
//
// A node registers, and renews its lease with heartbeats, which are in memory
// only. At the end of a lease the node becomes NOT_READY and its registration is
// over: whatever it sends next is refused with REGISTRATION_EXPIRED, so that it
// registers anew and then reports all of its sessions again. A heartbeat alone
// does not bring it back: the server has meanwhile declared its sessions lost,
// and only their reports say what is true. It cannot flap, as each way to READY
// begins a full lease.
//
// A registration outlives a restart of the server. At its start, and after it
// was stopped for a while, every node has a full lease before it can expire.
package dispatch

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// ReasonRegistrationExpired is the reason of the error that tells a node to
// register again. It is part of the protocol: never rename it.
const ReasonRegistrationExpired = "REGISTRATION_EXPIRED"

const (
	minPeriod = 5 * time.Second
	// heartbeatRate is how many heartbeats in a second all nodes together send at
	// most: with more than 500 nodes the period grows.
	heartbeatRate = 100
	leasePeriods  = 3
	jitterPart    = 10 // the period varies by a tenth

	// late is how far behind its plan the expiry may run before the server blames
	// itself for the silence and not the nodes.
	late = 3 * time.Second
)

// Gateways says which gateways there are.
type Gateways interface {
	// Gateways returns all of them, and a channel that closes when that has changed.
	Gateways() ([]*nodev1.Gateway, <-chan struct{})
}

// Storage knows the keys to object storage.
type Storage interface {
	// Assigned returns what a node needs to keep a session that is in object
	// storage. Where the server no longer knows the keys, they are missing in it: the
	// node then can say so, and does not take the session for a local one.
	Assigned(fleet.Storage) *nodev1.AssignedStorage
}

// Config of a Dispatcher. All but Logger and Storage is needed.
type Config struct {
	Store    store.Store
	Gateways Gateways
	// Storage is needed where sessions are kept in object storage.
	Storage Storage
	// Identify returns the id of the node that calls, from its certificate.
	Identify func(ctx context.Context) (nodeID string, err error)
	Logger   *slog.Logger
}

// Dispatcher serves nodev1.DispatchService.
type Dispatcher struct {
	nodev1.UnimplementedDispatchServiceServer
	config  Config
	log     *slog.Logger
	ready   chan struct{} // closed once the store was read
	mirror  *mirror
	reports *batcher

	mu    sync.Mutex
	nodes map[string]*registration // current ones, by node
	known int                      // nodes that have ever registered
	wake  chan struct{}            // holds one: the expiry looks again
}

// registration of a node that is current. Guarded by Dispatcher.mu.
type registration struct {
	id        string
	revision  store.Revision // of the transaction that made it
	heartbeat time.Time      // the last one; zero if none since the server started
	deadline  time.Time      // end of the lease
	over      chan struct{}  // closed when it is no longer current
}

var _ nodev1.DispatchServiceServer = (*Dispatcher)(nil)

// New returns a Dispatcher; it serves once Run runs.
func New(c Config) *Dispatcher {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Storage == nil {
		c.Storage = noStorage{}
	}
	return &Dispatcher{
		config: c, log: c.Logger, ready: make(chan struct{}),
		mirror: newMirror(), reports: newBatcher(c.Store, c.Logger),
		nodes: map[string]*registration{}, wake: make(chan struct{}, 1),
	}
}

// noStorage knows no keys.
type noStorage struct{}

func (noStorage) Assigned(s fleet.Storage) *nodev1.AssignedStorage {
	return &nodev1.AssignedStorage{Mode: protoconv.StorageMode(s.Mode), Prefix: s.Prefix}
}

// Run ends leases, follows the store and writes reports, until ctx ends. The
// error says that the store has been closed. Call it once.
func (d *Dispatcher) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := d.load(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	close(d.ready)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { d.reports.run(ctx) })
	wg.Go(func() { d.expire(ctx) })
	err := d.mirror.follow(ctx, d.config.Store, d.log)
	cancel()
	return err
}

// load gives every node that is registered a fresh grace.
func (d *Dispatcher) load(ctx context.Context) error {
	return d.config.Store.View(ctx, func(tx store.ReadTx) error {
		d.mu.Lock()
		defer d.mu.Unlock()
		for n, err := range tx.Nodes("") {
			if err != nil {
				return err
			}
			d.known++
			if n.State == fleet.NodeReady && n.RegistrationID != "" {
				d.nodes[n.ID] = &registration{id: n.RegistrationID, revision: tx.Revision(), over: make(chan struct{})}
			}
		}
		d.grace(time.Now())
		return nil
	})
}

// grace begins every lease anew. d.mu is held.
func (d *Dispatcher) grace(now time.Time) {
	for _, r := range d.nodes {
		_, lease := d.terms()
		r.deadline = now.Add(lease)
	}
}

// terms returns the period of heartbeats, with jitter, and the lease that goes
// with it. d.mu is held.
func (d *Dispatcher) terms() (period, lease time.Duration) {
	period = max(minPeriod, time.Duration(d.known)*time.Second/heartbeatRate)
	lease = leasePeriods * (period + period/jitterPart)
	return period + rand.N(period/jitterPart), lease
}

// HeartbeatTime returns when the node was heard last; zero if not since the
// server started.
func (d *Dispatcher) HeartbeatTime(node string) time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r := d.nodes[node]; r != nil {
		return r.heartbeat
	}
	return time.Time{}
}

// node returns who calls, once the dispatcher serves.
func (d *Dispatcher) node(ctx context.Context) (string, error) {
	id, err := d.config.Identify(ctx)
	if err != nil {
		return "", err
	}
	select {
	case <-d.ready:
		return id, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// current returns the channel that closes when the registration is over; or
// FAILED_PRECONDITION if it is over already.
func (d *Dispatcher) current(node, id string) (over <-chan struct{}, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.nodes[node]
	if r == nil || r.id != id {
		return nil, expired(node)
	}
	return r.over, nil
}

func expired(node string) error {
	return grpcerr.New(codes.FailedPrecondition, ReasonRegistrationExpired, "this is not the current registration of node %s: register again", node)
}

// poke lets the expiry look again.
func (d *Dispatcher) poke() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}
