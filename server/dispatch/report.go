package dispatch

import (
	"context"
	"errors"
	"sync"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// ReportStatus implements nodev1.DispatchServiceServer.
func (d *Dispatcher) ReportStatus(ctx context.Context, req *nodev1.ReportStatusRequest) (*nodev1.ReportStatusResponse, error) {
	node, _, err := d.current(ctx, req.GetRegistrationId())
	if err != nil {
		return nil, err
	}
	items := make([]*reportItem, len(req.GetStatuses()))
	for i, s := range req.GetStatuses() {
		items[i] = &reportItem{node: node, report: report(s)}
	}
	if err := d.reports.do(ctx, items); err != nil {
		return nil, err
	}
	resp := &nodev1.ReportStatusResponse{}
	for _, item := range items {
		resp.Results = append(resp.Results, &nodev1.ReportResult{Code: item.code})
	}
	return resp, nil
}

func report(s *nodev1.SessionStatus) fleet.Report {
	return fleet.Report{
		SessionID: s.GetSessionId(), SessionUID: s.GetSessionUid(), Generation: uint64(s.GetGeneration()),
		State:  fleet.ReportedState(s.GetState().String()),
		Reason: s.GetReason(), Message: s.GetMessage(), Progress: protoconv.ProgressFromProto(s.GetProgress()),
		RestartCount: s.GetRestartCount(), ReadyTime: protoconv.TimeFromProto(s.GetReadyTime()), OpenCodeVersion: s.GetOpencodeVersion(),
	}
}

type reportItem struct {
	node   string
	report fleet.Report
	code   nodev1.ReportResult_Code
}

// applyReports stores a batch in one transaction. One bad item fails alone.
func (d *Dispatcher) applyReports(ctx context.Context, items []*reportItem) error {
	_, err := d.cfg.Store.Update(ctx, func(tx store.Tx) error {
		for _, item := range items {
			code, err := d.applyReport(tx, item)
			if err != nil {
				return err // of the store: nothing of the batch is stored
			}
			item.code = code
		}
		return nil
	})
	return err
}

func (d *Dispatcher) applyReport(tx store.Tx, item *reportItem) (nodev1.ReportResult_Code, error) {
	s, err := tx.Session(item.report.SessionID)
	if errors.Is(err, fleet.ErrNotFound) {
		return nodev1.ReportResult_STALE, nil
	}
	if err != nil {
		return 0, err
	}
	change, err := s.ApplyReport(item.report, item.node)
	if err != nil {
		d.cfg.Log.Debug("report refused", "session", s.ID, "node", item.node, "error", err)
		return nodev1.ReportResult_STALE, nil
	}
	if change == fleet.Unchanged {
		return nodev1.ReportResult_STORED, nil
	}
	if err := tx.PutSession(s); err != nil {
		return 0, err
	}
	if change == fleet.Moved {
		if _, err := tx.AppendEvent(s); err != nil {
			return 0, err
		}
	}
	return nodev1.ReportResult_STORED, nil
}

// batcher puts what concurrent calls bring into few transactions: while one is
// on its way to disk, the next one gathers.
type batcher struct {
	apply func(context.Context, []*reportItem) error

	mu      sync.Mutex
	next    *batch // gathers; nil if nobody waits
	running bool
}

type batch struct {
	items []*reportItem
	done  chan struct{}
	err   error
}

// do returns once the items are on disk.
func (b *batcher) do(ctx context.Context, items []*reportItem) error {
	if len(items) == 0 {
		return nil
	}
	b.mu.Lock()
	if b.next == nil {
		b.next = &batch{done: make(chan struct{})}
	}
	mine := b.next
	mine.items = append(mine.items, items...)
	if b.running {
		b.mu.Unlock()
		select {
		case <-mine.done:
			return mine.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	// This caller carries batches to disk until none is left.
	b.running = true
	for b.next != nil {
		current := b.next
		b.next = nil
		b.mu.Unlock()
		// Another caller's items may be in it: this one's end must not undo them.
		current.err = b.apply(context.WithoutCancel(ctx), current.items)
		close(current.done)
		b.mu.Lock()
	}
	b.running = false
	b.mu.Unlock()
	return mine.err
}
