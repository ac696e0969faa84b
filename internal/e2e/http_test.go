//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// call makes one HTTP request with the right credentials and returns status and
// body. in is sent as JSON unless it is nil.
func (f *fleet) call(ctx context.Context, method, url string, in any) (int, []byte, error) {
	req, err := f.request(ctx, method, url, in)
	if err != nil {
		return 0, nil, err
	}
	resp, err := f.http.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	return resp.StatusCode, out, err
}

func (f *fleet) request(ctx context.Context, method, url string, in any) (*http.Request, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	req.SetBasicAuth(user, password)
	return req, nil
}

// openCode is a session's OpenCode as it is seen through the gateway.
type openCode struct {
	f    *fleet
	base string
}

func (f *fleet) openCode(session string) *openCode {
	return &openCode{f: f, base: "http://" + f.host(session)}
}

// try makes a call and decodes JSON into out unless that is nil.
func (o *openCode) try(ctx context.Context, method, path string, in, out any) error {
	code, body, err := o.f.call(ctx, method, o.base+path, in)
	switch {
	case err != nil:
		return err
	case code/100 != 2:
		return fmt.Errorf("%s %s: %d %s", method, path, code, body)
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("%s %s: %w: %.200s", method, path, err, body)
	}
	return nil
}

func (o *openCode) do(tb testing.TB, method, path string, in, out any) {
	tb.Helper()
	if err := o.try(bounded(tb, time.Minute), method, path, in, out); err != nil {
		tb.Fatal(err)
	}
}

func (o *openCode) newChat(tb testing.TB) string {
	tb.Helper()
	var chat struct{ ID string }
	o.do(tb, "POST", "/session", map[string]any{}, &chat)
	if chat.ID == "" {
		tb.Fatal("OpenCode made a chat without an id")
	}
	return chat.ID
}

// message is one of a chat.
type message struct {
	Info struct {
		ID, Role string
		Time     struct{ Completed float64 }
		Error    json.RawMessage
	}
	Parts []struct {
		ID, Type, Text, Tool string
		State                struct {
			Status, Output string
			Input          json.RawMessage
		}
	}
}

func (m message) text() string {
	var b strings.Builder
	for _, p := range m.Parts {
		if p.Type == "text" {
			b.WriteString(p.Text)
		}
	}
	return strings.TrimSpace(b.String())
}

func prompt(text string) map[string]any {
	return map[string]any{"parts": []any{map[string]any{"type": "text", "text": text}}}
}

// prompt sends one and returns the answer.
func (o *openCode) prompt(tb testing.TB, chat, text string) message {
	tb.Helper()
	var m message
	o.do(tb, "POST", "/session/"+chat+"/message", prompt(text), &m)
	if len(m.Info.Error) > 0 && string(m.Info.Error) != "null" {
		tb.Fatalf("the answer to %q is an error: %s", text, m.Info.Error)
	}
	return m
}

// begin sends a prompt without waiting for the answer.
func (o *openCode) begin(tb testing.TB, chat, text string) {
	tb.Helper()
	o.do(tb, "POST", "/session/"+chat+"/prompt_async", prompt(text), nil)
}

func (o *openCode) messages(ctx context.Context, chat string) (list []message, err error) {
	return list, o.try(ctx, "GET", "/session/"+chat+"/message", nil, &list)
}

// waitAnswer waits until the chat's last answer is complete and reads want.
func (o *openCode) waitAnswer(tb testing.TB, chat, want string) {
	tb.Helper()
	eventually(tb, time.Minute, "chat "+chat+" is answered", func() string {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		list, err := o.messages(ctx, chat)
		if err != nil {
			return err.Error()
		}
		if len(list) == 0 {
			return "no messages"
		}
		last := list[len(list)-1]
		if last.Info.Role != "assistant" || last.Info.Time.Completed == 0 {
			return fmt.Sprintf("%s: %q", last.Info.Role, last.text())
		}
		if got := last.text(); got != want {
			tb.Fatalf("the answer is %q, not %q", got, want)
		}
		return ""
	})
}

// tools returns the names of the chat's completed tool calls, in order.
func (o *openCode) tools(tb testing.TB, chat string) (names []string) {
	tb.Helper()
	list, err := o.messages(bounded(tb, 20*time.Second), chat)
	if err != nil {
		tb.Fatal(err)
	}
	for _, m := range list {
		for _, p := range m.Parts {
			if p.Type == "tool" {
				names = append(names, p.Tool+" "+p.State.Status)
			}
		}
	}
	return names
}

// event is one of a session, however it came.
type event struct {
	id, kind string    // kind: lifecycle, opencode, gap, checkpointed, end
	data     string    // the frame of OpenCode, or the message as JSON (by gRPC: of checkpointed only)
	at       time.Time // when it came

	session *cloudcodev1.Session // of a lifecycle event by gRPC
}

// isIdle says whether the chat's turn has ended.
func (e event) isIdle(chat string) bool {
	return e.kind == "opencode" && strings.Contains(e.data, `"session.idle"`) && strings.Contains(e.data, chat)
}

// watcher collects events, heartbeats left out, until it is closed.
type watcher struct {
	mu     sync.Mutex
	events []event
	beats  int
	err    error // why it ended

	cancel context.CancelFunc
	done   chan struct{}
}

func (w *watcher) add(e event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if e.kind == "heartbeat" {
		w.beats++
		return
	}
	e.at = time.Now()
	w.events = append(w.events, e)
}

func (w *watcher) list() []event {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]event(nil), w.events...)
}

func (w *watcher) close() {
	w.cancel()
	<-w.done
}

// wait returns the events up to and including the first that is wanted.
func (w *watcher) wait(tb testing.TB, what string, want func(event) bool) []event {
	tb.Helper()
	var got []event
	eventually(tb, 30*time.Second, "event "+what, func() string {
		got = w.list()
		for i, e := range got {
			if want(e) {
				got = got[:i+1]
				return ""
			}
		}
		select {
		case <-w.done:
			tb.Fatalf("the event stream ended before %s: %v; %d events", what, w.err, len(got))
		default:
		}
		return fmt.Sprintf("%d events so far", len(got))
	})
	return got
}

func (w *watcher) count(kind string) (n int) {
	for _, e := range w.list() {
		if e.kind == kind {
			n++
		}
	}
	return n
}

// watchSSE opens /v1/sessions/{id}/events. It returns once the headers are there.
func (f *fleet) watchSSE(tb testing.TB, session, lastEventID string) *watcher {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &watcher{cancel: cancel, done: make(chan struct{})}
	tb.Cleanup(w.close)
	resp, err := f.openSSE(ctx, session, lastEventID)
	if err != nil {
		close(w.done)
		tb.Fatal(err)
	}
	go func() {
		defer close(w.done)
		w.err = w.readSSE(resp)
	}()
	return w
}

func (f *fleet) openSSE(ctx context.Context, session, lastEventID string) (*http.Response, error) {
	req, err := f.request(ctx, "GET", f.url("/v1/sessions/"+session+"/events"), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "text/event-stream")
	if lastEventID != "" {
		req.Header.Set("Last-Event-ID", lastEventID)
	}
	resp, err := f.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK || !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream") {
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return nil, fmt.Errorf("events of %s: %s %s %s", session, resp.Status, resp.Header.Get("Content-Type"), b)
	}
	return resp, nil
}

func (w *watcher) readSSE(resp *http.Response) error {
	defer resp.Body.Close()
	var e event
	return readLines(resp.Body, func(line string) bool {
		field, value, _ := strings.Cut(line, ": ")
		switch field {
		case "":
			if e.kind != "" {
				w.add(e)
			}
			e = event{}
		case "id":
			e.id = value
		case "event":
			e.kind = value
		case "data":
			e.data += value
		}
		return true
	})
}

// follow is an SSE client that comes back with the last id whenever the stream
// breaks, as EventSource does.
func (f *fleet) follow(tb testing.TB, session string) *watcher {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &watcher{cancel: cancel, done: make(chan struct{})}
	tb.Cleanup(w.close)
	first := make(chan struct{})
	go func() {
		defer close(w.done)
		for opened := false; ctx.Err() == nil; {
			last := ""
			for _, e := range w.list() {
				if e.id != "" {
					last = e.id
				}
			}
			resp, err := f.openSSE(ctx, session, last)
			if err == nil {
				if !opened {
					opened = true
					close(first)
				}
				err = w.readSSE(resp)
			}
			w.err = err
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}()
	select {
	case <-first:
	case <-time.After(20 * time.Second):
		tb.Fatal("no event stream within 20 s")
	}
	return w
}

// watchGRPC calls WatchSessionEvents.
func (f *fleet) watchGRPC(tb testing.TB, session, after string) *watcher {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &watcher{cancel: cancel, done: make(chan struct{})}
	stream, err := f.sessions.WatchSessionEvents(ctx, &cloudcodev1.WatchSessionEventsRequest{Name: "sessions/" + session, After: after})
	if err == nil {
		// Its beginning, so that what happens from now on is seen.
		var e *cloudcodev1.SessionEvent
		if e, err = stream.Recv(); err == nil {
			w.addProto(e)
		}
	}
	if err != nil {
		cancel()
		tb.Fatalf("watch %s: %v", session, err)
	}
	tb.Cleanup(w.close)
	go func() {
		defer close(w.done)
		for {
			e, err := stream.Recv()
			if err != nil {
				if !errors.Is(err, io.EOF) && status.Code(err) != codes.Canceled {
					w.err = err
				}
				return
			}
			w.addProto(e)
		}
	}()
	return w
}

func (w *watcher) addProto(e *cloudcodev1.SessionEvent) {
	out := event{id: e.GetId()}
	switch v := e.GetEvent().(type) {
	case *cloudcodev1.SessionEvent_Lifecycle:
		out.kind, out.session = "lifecycle", v.Lifecycle.GetSession()
	case *cloudcodev1.SessionEvent_Checkpointed:
		b, _ := protojson.Marshal(v.Checkpointed)
		out.kind, out.data = "checkpointed", string(b)
	case *cloudcodev1.SessionEvent_Opencode:
		out.kind, out.data = "opencode", v.Opencode.GetFrame()
	case *cloudcodev1.SessionEvent_Gap:
		out.kind = "gap"
	case *cloudcodev1.SessionEvent_End:
		out.kind = "end"
	default:
		out.kind = "heartbeat"
	}
	w.add(out)
}
