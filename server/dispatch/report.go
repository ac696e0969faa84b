package dispatch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

const (
	maxStatuses = 20_000 // in one call; gRPC's bound of 4 MiB comes first
	batchItems  = 1000   // statuses in one transaction, about
	maxText     = 4 << 10
)

// ReportStatus implements nodev1.DispatchService.
func (d *Dispatcher) ReportStatus(ctx context.Context, req *nodev1.ReportStatusRequest) (*nodev1.ReportStatusResponse, error) {
	id, err := d.node(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := d.current(id, req.GetRegistrationId()); err != nil {
		return nil, err
	}
	if n := len(req.GetStatuses()); n > maxStatuses {
		return nil, grpcerr.New(codes.InvalidArgument, "INVALID_FIELDS", "statuses: %d are too many for one call", n)
	}
	c := &reportCall{node: id, registration: req.GetRegistrationId(), done: make(chan struct{})}
	for _, s := range req.GetStatuses() {
		c.reports = append(c.reports, report(s))
	}
	c.results = make([]nodev1.ReportResult_Code, len(c.reports))
	if len(c.reports) > 0 {
		if err := d.reports.do(ctx, c); err != nil {
			return nil, err
		}
	}
	resp := &nodev1.ReportStatusResponse{Results: make([]*nodev1.ReportResult, len(c.results))}
	for i, code := range c.results {
		resp.Results[i] = &nodev1.ReportResult{Code: code}
	}
	return resp, nil
}

func report(s *nodev1.SessionStatus) fleet.Report {
	states := map[nodev1.SessionStatus_State]fleet.ReportedState{
		nodev1.SessionStatus_STARTING: fleet.ReportedStarting, nodev1.SessionStatus_RUNNING: fleet.ReportedRunning,
		nodev1.SessionStatus_FAILED: fleet.ReportedFailed, nodev1.SessionStatus_GONE: fleet.ReportedGone,
		nodev1.SessionStatus_SUSPENDING: fleet.ReportedSuspending, nodev1.SessionStatus_SUSPENDED: fleet.ReportedSuspended,
	}
	r := fleet.Report{
		SessionID: s.GetSessionId(), SessionUID: s.GetSessionUid(), Generation: uint64(s.GetGeneration()),
		State: states[s.GetState()], Reason: clip(s.GetReason()), Message: clip(s.GetMessage()),
		Progress: protoconv.ProgressFromProto(s.GetProgress()), RestartCount: s.GetRestartCount(),
		ReadyTime: protoconv.TimeFromProto(s.GetReadyTime()), OpenCodeVersion: clip(s.GetOpencodeVersion()),
		Storage: protoconv.StorageStatusFromProto(s.GetStorage()),
	}
	if r.Progress != nil {
		r.Progress.Phase, r.Progress.Detail = clip(r.Progress.Phase), clip(r.Progress.Detail)
	}
	if st := r.Storage; st != nil {
		st.Message, st.Mounter = clip(st.Message), clip(st.Mounter)
		if c := st.Checkpoint; c != nil {
			c.ID, c.Trigger, c.OpenCodeVersion, c.Node = clip(c.ID), clip(c.Trigger), clip(c.OpenCodeVersion), clip(c.Node)
			c.Notes = nil // these are for ListCheckpoints
		}
	}
	return r
}

// clip bounds what one report can make the store hold.
func clip(s string) string {
	if len(s) <= maxText {
		return s
	}
	return strings.ToValidUTF8(s[:maxText], "") + "…"
}

// reportCall is one call's statuses on their way to disk.
type reportCall struct {
	node, registration string
	reports            []fleet.Report

	// Set before done is closed.
	results []nodev1.ReportResult_Code // for each report
	err     error                      // of the whole call
	done    chan struct{}
}

// batcher stores the statuses of all calls that wait at the same time in one
// transaction.
type batcher struct {
	store store.Store
	log   *slog.Logger

	mu      sync.Mutex
	waiting []*reportCall
	stopped bool
	wake    chan struct{} // holds one
}

func newBatcher(s store.Store, log *slog.Logger) *batcher {
	return &batcher{store: s, log: log, wake: make(chan struct{}, 1)}
}

var errStopping = fmt.Errorf("%w: the server is stopping", fleet.ErrUnavailable)

// do returns once the call's results are on disk. A caller that goes away leaves
// it behind; it may be stored or not.
func (b *batcher) do(ctx context.Context, c *reportCall) error {
	b.mu.Lock()
	if b.stopped {
		b.mu.Unlock()
		return errStopping
	}
	b.waiting = append(b.waiting, c)
	b.mu.Unlock()
	b.poke()
	select {
	case <-c.done:
		return c.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (b *batcher) poke() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// run stores until ctx ends; whoever waits then is told.
func (b *batcher) run(ctx context.Context) {
	for {
		select {
		case <-b.wake:
			for calls := b.take(batchItems); len(calls) > 0; calls = b.take(batchItems) {
				b.storeAll(ctx, calls)
			}
		case <-ctx.Done():
			b.mu.Lock()
			b.stopped = true
			b.mu.Unlock()
			for _, c := range b.take(0) {
				c.err = errStopping
				close(c.done)
			}
			return
		}
	}
}

// take returns the calls that wait: at least one, until they have `most` items; 0: all.
func (b *batcher) take(most int) []*reportCall {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, items := 0, 0
	for n < len(b.waiting) && (most == 0 || n == 0 || items+len(b.waiting[n].reports) <= most) {
		items += len(b.waiting[n].reports)
		n++
	}
	calls := b.waiting[:n:n]
	b.waiting = append([]*reportCall(nil), b.waiting[n:]...)
	return calls
}

// storeAll stores calls in one transaction and answers them.
func (b *batcher) storeAll(ctx context.Context, calls []*reportCall) {
	err := b.update(ctx, calls)
	if err != nil && ctx.Err() == nil && !errors.Is(err, fleet.ErrUnavailable) && !errors.Is(err, fleet.ErrResourceExhausted) {
		// Something in it cannot be stored. What that is must not stop the rest.
		b.log.ErrorContext(ctx, "cannot store reports together; trying each by itself", "error", err)
		b.storeEach(ctx, calls)
		err = nil
	}
	for _, c := range calls {
		if err != nil {
			c.err = fmt.Errorf("store reports: %w", err)
		}
		close(c.done)
	}
}

func (b *batcher) storeEach(ctx context.Context, calls []*reportCall) {
	for _, c := range calls {
		for i, r := range c.reports {
			one := &reportCall{node: c.node, registration: c.registration, reports: []fleet.Report{r}, results: make([]nodev1.ReportResult_Code, 1)}
			if err := b.update(ctx, []*reportCall{one}); err != nil {
				b.log.ErrorContext(ctx, "cannot store a report", "node", c.node, "session", r.SessionID, "error", err)
				one.results[0] = nodev1.ReportResult_RETRY
			}
			c.results[i] = one.results[0]
			if one.err != nil { // the registration is over
				c.err = one.err
				break
			}
		}
	}
}

func (b *batcher) update(ctx context.Context, calls []*reportCall) error {
	now := time.Now().UTC()
	_, err := b.store.Update(ctx, func(tx store.Tx) error {
		for _, c := range calls {
			if err := b.apply(ctx, tx, c, now); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

// apply runs in a transaction, perhaps more than once.
func (b *batcher) apply(ctx context.Context, tx store.Tx, c *reportCall, now time.Time) error {
	c.err = nil
	n, err := tx.Node(c.node)
	if err != nil && !errors.Is(err, fleet.ErrNotFound) {
		return err
	}
	if err != nil || n.RegistrationID != c.registration {
		c.err = expired(c.node)
		return nil
	}
	for i, r := range c.reports {
		c.results[i] = nodev1.ReportResult_STORED
		s, err := tx.Session(r.SessionID)
		if errors.Is(err, fleet.ErrNotFound) {
			c.results[i] = nodev1.ReportResult_STALE
			continue
		} else if err != nil {
			return err
		}
		outcome, err := s.ApplyReport(r, c.node, now)
		if err != nil {
			level := slog.LevelWarn
			if errors.Is(err, fleet.ErrStale) {
				level = slog.LevelDebug
			}
			b.log.Log(ctx, level, "report refused", "node", c.node, "error", err)
			c.results[i] = nodev1.ReportResult_STALE
			continue
		}
		if outcome == fleet.Unchanged {
			continue
		}
		if err := tx.PutSession(s); err != nil {
			return err
		}
		if outcome == fleet.Changed {
			if _, err := tx.AppendEvent(s); err != nil {
				return err
			}
		}
	}
	return nil
}
