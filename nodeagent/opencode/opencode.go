// Package opencode is all that the node daemon knows of OpenCode's HTTP API.
package opencode

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/container"
)

const (
	// A request that arrives between OpenCode's bind and its being ready, about
	// 0.15 s, is never answered. So probes do not wait for one another: the first
	// that comes after it is answered at once.
	probeInterval = 25 * time.Millisecond
	probeTimeout  = time.Second
	maxProbes     = 16 // at the same time: more than fit into that window
	// silence after which an event stream counts as dead; OpenCode sends a
	// heartbeat every 10 s.
	silence = 30 * time.Second
	// maxFrame bounds one event; the largest seen was 35 KB.
	maxFrame = 8 << 20
)

// Client talks to one session's OpenCode.
type Client struct {
	http     *http.Client
	password string
}

// NewClient returns a client that reaches OpenCode through dial. Close it.
func NewClient(dial func(ctx context.Context) (net.Conn, error), password string) *Client {
	return &Client{password: password, http: &http.Client{Transport: &http.Transport{
		DialContext:         func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		MaxIdleConnsPerHost: 1,
		IdleConnTimeout:     time.Minute,
		DisableCompression:  true,
	}}}
}

// Close lets go of idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func (c *Client) get(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort("opencode", strconv.Itoa(container.OpenCodePort))+path, nil)
	if err != nil {
		return nil, err
	}
	req.SetBasicAuth(container.OpenCodeUser, c.password)
	return c.http.Do(req)
}

// Health asks once, and returns OpenCode's version.
func (c *Client) Health(ctx context.Context) (version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	resp, err := c.get(ctx, "/global/health")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	// Paths that it does not know answer 200 text/html, the web UI.
	if kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); resp.StatusCode != http.StatusOK || kind != "application/json" {
		return "", fmt.Errorf("health check answered %s, %q: not OpenCode, or another password", resp.Status, resp.Header.Get("Content-Type"))
	}
	var health struct {
		Healthy bool   `json:"healthy"`
		Version string `json:"version"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&health); err != nil {
		return "", fmt.Errorf("health check: %w", err)
	}
	if !health.Healthy {
		return "", errors.New("OpenCode says that it is not healthy")
	}
	return health.Version, nil
}

// WaitReady asks until OpenCode is healthy or ctx ends; then the error says what
// the last answer was.
func (c *Client) WaitReady(ctx context.Context) (version string, err error) {
	type answer struct {
		version string
		err     error
	}
	answers := make(chan answer)
	var probes sync.WaitGroup
	defer probes.Wait()
	pctx, cancel := context.WithCancel(ctx)
	defer cancel()
	tick := time.NewTicker(probeInterval)
	defer tick.Stop()
	last := errors.New("none")
	for asking := 0; ; {
		if asking < maxProbes {
			asking++
			probes.Go(func() {
				version, err := c.Health(pctx)
				select {
				case answers <- answer{version, err}:
				case <-pctx.Done():
				}
			})
		}
		for ticked := false; !ticked; {
			select {
			case a := <-answers:
				if a.err == nil {
					return a.version, nil
				}
				asking--
				last = a.err
			case <-tick.C:
				ticked = true
			case <-ctx.Done():
				return "", fmt.Errorf("%w; last answer: %w", ctx.Err(), last)
			}
		}
	}
}

// Event is one frame of /global/event.
type Event struct {
	Type      string
	Directory string
	Frame     []byte // verbatim JSON; the receiver may keep it
}

// Watch reads the event stream until it breaks or ctx ends, and hands every
// frame to fn, in order. It returns why it ended, never nil.
func (c *Client) Watch(ctx context.Context, connected func(), fn func(Event)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(silence, func() { cancel(fmt.Errorf("no event and no heartbeat for %v", silence)) })
	defer watchdog.Stop()
	resp, err := c.get(ctx, "/global/event")
	if err != nil {
		return cause(ctx, err)
	}
	defer resp.Body.Close()
	if kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); resp.StatusCode != http.StatusOK || kind != "text/event-stream" {
		return fmt.Errorf("event stream answered %s, %q", resp.Status, resp.Header.Get("Content-Type"))
	}
	connected()
	err = readFrames(resp.Body, func(frame []byte) {
		watchdog.Reset(silence)
		fn(parse(frame))
	})
	return cause(ctx, err)
}

func cause(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil {
		return c
	}
	return err
}

// parse finds type and folder of a frame. Types that we do not know, and frames
// that we cannot read, are passed on as they are.
func parse(frame []byte) Event {
	var f struct {
		Directory string `json:"directory"`
		Payload   struct {
			Type string `json:"type"`
		} `json:"payload"`
	}
	if json.Unmarshal(frame, &f) != nil {
		return Event{Frame: frame}
	}
	if strings.HasPrefix(f.Payload.Type, "cloudcode.") {
		f.Payload.Type = "" // what only we say, a program in the container must not
	}
	return Event{Type: f.Payload.Type, Directory: f.Directory, Frame: frame}
}

// readFrames reads server-sent events and hands the data of each to fn. The
// error is io.ErrUnexpectedEOF when the stream ends.
func readFrames(r io.Reader, fn func(data []byte)) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 64<<10), maxFrame)
	var data []byte
	for lines.Scan() {
		line := lines.Bytes()
		if len(line) == 0 {
			if data != nil {
				fn(data)
				data = nil
			}
			continue
		}
		value, ok := bytes.CutPrefix(line, []byte("data:"))
		if !ok {
			continue // a comment, or a field that OpenCode does not send
		}
		value = bytes.TrimPrefix(value, []byte(" "))
		if data == nil {
			data = make([]byte, 0, len(value))
		} else {
			data = append(data, '\n')
		}
		if len(data)+len(value) > maxFrame {
			return fmt.Errorf("an event is larger than %d bytes", maxFrame)
		}
		data = append(data, value...)
	}
	if err := lines.Err(); err != nil {
		return err
	}
	return io.ErrUnexpectedEOF
}

// ChatStatus returns what an event says of whether a chat is at work; ok is false
// for all other events. A chat that waits for an answer or tries again is busy.
func ChatStatus(e Event) (chat string, busy, ok bool) {
	if e.Type != "session.status" && e.Type != "session.idle" {
		return "", false, false
	}
	var f struct {
		Payload struct {
			Properties struct {
				SessionID string `json:"sessionID"`
				Status    struct {
					Type string `json:"type"`
				} `json:"status"`
			} `json:"properties"`
		} `json:"payload"`
	}
	if json.Unmarshal(e.Frame, &f) != nil || f.Payload.Properties.SessionID == "" {
		return "", false, false
	}
	busy = e.Type == "session.status" && f.Payload.Properties.Status.Type != "idle"
	return f.Payload.Properties.SessionID, busy, true
}
