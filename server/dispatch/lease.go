package dispatch

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
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
	maxLabels     = 64
	maxLabelBytes = 16 << 10 // all of them together
	expireRetry   = time.Second
)

// Register implements nodev1.DispatchService.
func (d *Dispatcher) Register(ctx context.Context, req *nodev1.RegisterRequest) (*nodev1.RegisterResponse, error) {
	id, err := d.node(ctx)
	if err != nil {
		return nil, err
	}
	size := 0
	for k, v := range req.GetLabels() {
		size += len(k) + len(v)
	}
	if len(req.GetLabels()) > maxLabels || size > maxLabelBytes {
		return nil, grpcerr.New(codes.InvalidArgument, "INVALID_FIELDS", "labels: a node has at most %d, of %d bytes together", maxLabels, maxLabelBytes)
	}
	now := time.Now().UTC()
	r := &registration{id: rand.Text(), heartbeat: now, over: make(chan struct{})}
	var made bool
	var was fleet.NodeState
	r.revision, err = d.config.Store.Update(ctx, func(tx store.Tx) error {
		n, err := tx.Node(id)
		made = errors.Is(err, fleet.ErrNotFound)
		if made {
			n = &fleet.Node{ID: id, CreateTime: now}
		} else if err != nil {
			return err
		}
		// Two machines of one id would run the same sessions.
		if n.State == fleet.NodeReady && n.InstanceID != "" && n.InstanceID != req.GetInstanceId() {
			return grpcerr.New(codes.AlreadyExists, "NODE_ID_IN_USE", "another machine is node %s: start this one with another --node-id; if it is the same machine with a new disk, it is taken once the old lease has ended", id)
		}
		was, n.InstanceID = n.State, req.GetInstanceId()
		n.Labels = protoconv.Map(req.GetLabels())
		n.Info = protoconv.NodeInfoFromProto(req.GetInfo())
		n.State, n.Reason, n.Message = fleet.NodeReady, "", ""
		n.RegistrationID, n.HeartbeatTime = r.id, now
		return tx.PutNode(n)
	})
	if err != nil {
		return nil, fmt.Errorf("register node %s: %w", id, err)
	}
	period, lease := d.registered(id, r, made)
	d.log.InfoContext(ctx, "node registered", "node", id, "was", was, "version", req.GetInfo().GetVersion(), "lease", lease)
	return &nodev1.RegisterResponse{
		RegistrationId: r.id, HeartbeatPeriod: durationpb.New(period), LeaseDuration: durationpb.New(lease),
	}, nil
}

// registered makes r the node's registration, unless a newer one was committed
// meanwhile: then r is over as it begins.
func (d *Dispatcher) registered(node string, r *registration, made bool) (period, lease time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if made {
		d.known++
	}
	period, lease = d.terms()
	r.deadline = time.Now().Add(lease)
	old := d.nodes[node]
	if old != nil && old.revision > r.revision {
		return period, lease
	}
	if old != nil {
		close(old.over)
	}
	d.nodes[node] = r
	d.poke()
	return period, lease
}

// Heartbeat implements nodev1.DispatchService.
func (d *Dispatcher) Heartbeat(ctx context.Context, req *nodev1.HeartbeatRequest) (*nodev1.HeartbeatResponse, error) {
	id, err := d.node(ctx)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.nodes[id]
	if r == nil || r.id != req.GetRegistrationId() {
		return nil, expired(id)
	}
	period, lease := d.terms()
	now := time.Now()
	// Never back: a lease that was promised is kept when the fleet shrinks.
	if deadline := now.Add(lease); deadline.After(r.deadline) {
		r.deadline = deadline
	}
	r.heartbeat = now.UTC()
	return &nodev1.HeartbeatResponse{HeartbeatPeriod: durationpb.New(period), LeaseDuration: durationpb.New(lease)}, nil
}

// lapsed is a registration whose lease has ended.
type lapsed struct {
	node, registration string
	heartbeat          time.Time
}

// expire ends leases until ctx ends.
func (d *Dispatcher) expire(ctx context.Context) {
	var due []lapsed // not stored yet
	var planned time.Time
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.wake:
		case <-timer.C:
		}
		found, next := d.lapse(time.Now(), planned)
		due = append(due, found...)
		if len(due) > 0 {
			if err := d.storeLapsed(ctx, due); err == nil {
				due = nil
			} else if ctx.Err() == nil {
				d.log.ErrorContext(ctx, "cannot store that nodes are not ready; trying again", "nodes", len(due), "error", err)
				next = min(next, expireRetry)
			}
		}
		// What was spent on storing does not count as being late.
		planned = time.Now().Add(next)
		timer.Reset(next)
	}
}

// lapse takes the registrations whose lease has ended, and says how long no
// other can end; planned is when this should have run, zero if never. They are over from here on and not only once that is stored: a
// heartbeat that was answered in between would promise a lease that is not kept.
func (d *Dispatcher) lapse(now, planned time.Time) (found []lapsed, next time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if behind := now.Sub(planned); !planned.IsZero() && behind > late {
		d.log.Warn("the server did not run for a while; every node gets a fresh lease", "late", behind)
		d.grace(now)
	}
	next = time.Hour
	for node, r := range d.nodes {
		if left := r.deadline.Sub(now); left > 0 {
			next = min(next, left)
			continue
		}
		close(r.over)
		delete(d.nodes, node)
		found = append(found, lapsed{node, r.id, r.heartbeat})
	}
	return found, next
}

// storeLapsed makes the nodes NOT_READY that have not registered anew.
func (d *Dispatcher) storeLapsed(ctx context.Context, due []lapsed) error {
	var stored []string
	_, err := d.config.Store.Update(ctx, func(tx store.Tx) error {
		stored = nil
		for _, l := range due {
			n, err := tx.Node(l.node)
			if err != nil {
				if errors.Is(err, fleet.ErrNotFound) {
					continue
				}
				return err
			}
			if n.RegistrationID != l.registration {
				continue
			}
			if !l.heartbeat.IsZero() {
				n.HeartbeatTime = l.heartbeat
			}
			n.State, n.Reason = fleet.NodeNotReady, fleet.ReasonHeartbeatMissed
			n.Message = fmt.Sprintf("Node %s was last heard of at %s: check the machine, its network, and that `cloudcode nodeagent` runs on it.",
				n.ID, n.HeartbeatTime.UTC().Format(time.RFC3339))
			n.RegistrationID = ""
			if err := tx.PutNode(n); err != nil {
				return err
			}
			stored = append(stored, n.ID)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, id := range stored {
		d.log.WarnContext(ctx, "node is not ready: its lease has ended", "node", id)
	}
	return nil
}
