// Package dispatch speaks the node protocol: registrations, leases, assignments
// and reports.
//
//	dispatch.New(dispatch.Config{...}) *dispatch.Dispatcher  // nodev1.DispatchServiceServer
//	go d.Run(ctx)                                            // expiry of leases
//
// Leases are kept in memory; what is on disk is whether a node is ready. When
// the server starts, every ready node gets a fresh lease, so that a restart of
// the server takes no node out.
package dispatch

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

const (
	// minPeriod between two heartbeats of a node; with many nodes it grows so
	// that the server sees at most heartbeatsPerSecond.
	minPeriod           = 5 * time.Second
	heartbeatsPerSecond = 50
	// periodsPerLease is how many heartbeats a node may miss.
	periodsPerLease = 3
)

// Gateways tells which gateways there are.
type Gateways interface {
	// Gateways returns the present set and a channel that is closed when it changes.
	Gateways() (gateways []*nodev1.Gateway, changed <-chan struct{})
}

// Config of a Dispatcher.
type Config struct {
	Store    store.Store
	Gateways Gateways
	// Identify returns the id of the node that calls.
	Identify func(ctx context.Context) (nodeID string, err error)
	Log      *slog.Logger
}

// Dispatcher implements nodev1.DispatchServiceServer.
type Dispatcher struct {
	nodev1.UnimplementedDispatchServiceServer
	cfg     Config
	reports *batcher

	mu     sync.Mutex
	leases map[string]*lease
	wake   chan struct{} // holds one: an expiry may be nearer than Run thinks
}

// lease of one node. ended is closed when the registration is replaced.
type lease struct {
	registration string
	last         time.Time // when the node was last heard of
	expires      time.Time
	expired      bool // NOT_READY is on disk, or on its way there
	ended        chan struct{}
}

// New returns a dispatcher.
func New(cfg Config) *Dispatcher {
	d := &Dispatcher{cfg: cfg, leases: map[string]*lease{}, wake: make(chan struct{}, 1)}
	d.reports = &batcher{apply: d.applyReports}
	return d
}

// HeartbeatTime is when a node was last heard of by this server; zero if never.
func (d *Dispatcher) HeartbeatTime(node string) time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	if l := d.leases[node]; l != nil {
		return l.last
	}
	return time.Time{}
}

// period between two heartbeats. mu is held.
func (d *Dispatcher) period() time.Duration {
	p := max(minPeriod, time.Duration(len(d.leases))*time.Second/heartbeatsPerSecond)
	return p - p/10 + mathrand.N(p/5)
}

// renew counts from now. mu is held.
func (d *Dispatcher) renew(l *lease) (period, duration time.Duration) {
	period = d.period()
	duration = periodsPerLease * max(minPeriod, time.Duration(len(d.leases))*time.Second/heartbeatsPerSecond)
	l.last = time.Now()
	l.expires = l.last.Add(duration)
	return period, duration
}

// Register implements nodev1.DispatchServiceServer.
func (d *Dispatcher) Register(ctx context.Context, req *nodev1.RegisterRequest) (*nodev1.RegisterResponse, error) {
	node, err := d.cfg.Identify(ctx)
	if err != nil {
		return nil, err
	}
	id := rand.Text()
	_, err = d.cfg.Store.Update(ctx, func(tx store.Tx) error {
		n, err := tx.Node(node)
		if errors.Is(err, fleet.ErrNotFound) {
			n, err = &fleet.Node{ID: node, CreateTime: time.Now()}, nil
		}
		if err != nil {
			return err
		}
		n.Labels, n.Info = req.GetLabels(), protoconv.NodeInfoFromProto(req.GetInfo())
		n.State, n.Reason, n.Message = fleet.NodeReady, "", ""
		n.RegistrationID, n.HeartbeatTime = id, time.Now()
		return tx.PutNode(n)
	})
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if old := d.leases[node]; old != nil {
		close(old.ended)
	}
	l := &lease{registration: id, ended: make(chan struct{})}
	d.leases[node] = l
	period, duration := d.renew(l)
	d.signal()
	d.cfg.Log.Info("node registered", "node", node, "registration", id)
	return &nodev1.RegisterResponse{
		RegistrationId: id, HeartbeatPeriod: durationpb.New(period), LeaseDuration: durationpb.New(duration),
	}, nil
}

func (d *Dispatcher) signal() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// current returns the node's lease if the registration is the current one. After
// a restart of the server it is taken from the store.
func (d *Dispatcher) current(ctx context.Context, registration string) (string, *lease, error) {
	node, err := d.cfg.Identify(ctx)
	if err != nil {
		return "", nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.leases[node]
	if l == nil || l.registration != registration || l.expired {
		return "", nil, grpcerr.New(codes.FailedPrecondition, "REGISTRATION_EXPIRED", "this registration of node %s is over: register again", node)
	}
	return node, l, nil
}

// Heartbeat implements nodev1.DispatchServiceServer. A node whose lease has
// expired must register again: then it reports everything anew.
func (d *Dispatcher) Heartbeat(ctx context.Context, req *nodev1.HeartbeatRequest) (*nodev1.HeartbeatResponse, error) {
	_, l, err := d.current(ctx, req.GetRegistrationId())
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	period, duration := d.renew(l)
	return &nodev1.HeartbeatResponse{HeartbeatPeriod: durationpb.New(period), LeaseDuration: durationpb.New(duration)}, nil
}

// Run expires leases until ctx ends.
func (d *Dispatcher) Run(ctx context.Context) error {
	if err := d.grace(ctx); err != nil {
		return err
	}
	for {
		next := d.expire(ctx)
		timer := time.NewTimer(next)
		select {
		case <-timer.C:
		case <-d.wake:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
		timer.Stop()
	}
}

// grace gives every node that was ready when the server ended a fresh lease.
func (d *Dispatcher) grace(ctx context.Context) error {
	return d.cfg.Store.View(ctx, func(tx store.ReadTx) error {
		for n, err := range tx.Nodes("") {
			if err != nil {
				return err
			}
			d.mu.Lock()
			if d.leases[n.ID] == nil && n.State == fleet.NodeReady {
				l := &lease{registration: n.RegistrationID, ended: make(chan struct{})}
				d.leases[n.ID] = l
				d.renew(l)
				l.last = n.HeartbeatTime
			}
			d.mu.Unlock()
		}
		return nil
	})
}

// expire ends the leases whose time has come, and says when to look again.
func (d *Dispatcher) expire(ctx context.Context) time.Duration {
	type due struct {
		node  string
		lease *lease
	}
	next := time.Minute
	var over []due
	d.mu.Lock()
	now := time.Now()
	for node, l := range d.leases {
		if l.expired {
			continue
		}
		if wait := l.expires.Sub(now); wait > 0 {
			next = min(next, wait)
			continue
		}
		l.expired = true
		over = append(over, due{node, l})
	}
	d.mu.Unlock()
	for _, o := range over {
		if err := d.markLost(ctx, o.node, o.lease); err != nil && ctx.Err() == nil {
			d.cfg.Log.Error("cannot mark a node as not ready", "node", o.node, "error", err)
			d.mu.Lock()
			o.lease.expired = false // again, soon
			d.mu.Unlock()
			next = min(next, time.Second)
		}
	}
	return next
}

// markLost compares the registration inside the transaction: a node that has
// registered again meanwhile is left alone.
func (d *Dispatcher) markLost(ctx context.Context, node string, l *lease) error {
	_, err := d.cfg.Store.Update(ctx, func(tx store.Tx) error {
		n, err := tx.Node(node)
		if err != nil {
			return err
		}
		if n.RegistrationID != l.registration || n.State != fleet.NodeReady {
			return nil
		}
		n.State, n.Reason = fleet.NodeNotReady, fleet.ReasonHeartbeatMissed
		n.Message = fmt.Sprintf("not heard of since %s: is its node daemon running, and can it reach this server?", l.last.UTC().Format(time.RFC3339))
		n.HeartbeatTime = l.last
		return tx.PutNode(n)
	})
	if err == nil {
		d.cfg.Log.Warn("node is not ready: its lease has expired", "node", node)
	}
	return err
}
