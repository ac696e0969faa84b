//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// stubModel is an OpenAI-compatible model that does what the prompt says:
//
//	write FILE TEXT   calls OpenCode's write tool, then its bash tool, then answers
//	bash COMMAND      calls OpenCode's bash tool, then answers with what came back
//	slow KEY N        answers in N parts; each waits for release(KEY)
//	work KEY N        N times streams a line and then calls the bash tool, which
//	                  writes a numbered file and commits it (see workStep)
//	anything else     is answered with "You said: …"
//
// Requests without tools ask for a chat's title and get one.
type stubModel struct {
	server   *http.Server
	listener net.Listener
	served   chan struct{}

	mu       sync.Mutex
	requests []modelRequest
	gates    map[string]chan struct{}
}

// modelRequest is what OpenCode asked.
type modelRequest struct {
	Stream   bool              `json:"stream"`
	Messages []modelMessage    `json:"messages"`
	Tools    []json.RawMessage `json:"tools"`
	auth     string
}

type modelMessage struct {
	Role    string          `json:"role"`
	Content json.RawMessage `json:"content"`
}

// text of a message, which is a string or a list of parts.
func (m modelMessage) text() string {
	var s string
	if json.Unmarshal(m.Content, &s) == nil {
		return s
	}
	var parts []struct{ Text string }
	_ = json.Unmarshal(m.Content, &parts)
	var b strings.Builder
	for _, p := range parts {
		b.WriteString(p.Text)
		b.WriteByte('\n')
	}
	return b.String()
}

const modelKey = "stub-key"

// startModel listens on every address: containers reach it by their bridge's.
func startModel(tb testing.TB) *stubModel {
	lis, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		tb.Fatal(err)
	}
	m := &stubModel{listener: lis, gates: map[string]chan struct{}{}, served: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/chat/completions", m.complete)
	m.server = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		defer close(m.served)
		_ = m.server.Serve(lis) // always ErrServerClosed
	}()
	return m
}

func (m *stubModel) close() {
	_ = m.server.Close()
	<-m.served
}

// config is an OpenCode configuration whose only model is this one.
// bridge is the address by which containers reach this machine.
func (m *stubModel) config(bridge string) string {
	_, port, _ := net.SplitHostPort(m.listener.Addr().String())
	b, _ := json.Marshal(map[string]any{
		"model": "stub/stub-1", "small_model": "stub/stub-1", "enabled_providers": []string{"stub"},
		"share": "disabled", "autoupdate": false, "permission": "allow",
		"provider": map[string]any{"stub": map[string]any{
			"npm": "@ai-sdk/openai-compatible", "name": "Stub",
			"options": map[string]any{"baseURL": "http://" + net.JoinHostPort(bridge, port) + "/v1", "apiKey": modelKey},
			"models": map[string]any{"stub-1": map[string]any{
				"name": "Stub", "tool_call": true, "limit": map[string]any{"context": 128000, "output": 8192},
			}},
		}},
	})
	return string(b)
}

// gate of a slow answer. A value sent on it releases one part.
func (m *stubModel) gate(key string) chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	g := m.gates[key]
	if g == nil {
		g = make(chan struct{}, 1000)
		m.gates[key] = g
	}
	return g
}

// release lets n more parts of a slow answer go.
func (m *stubModel) release(key string, n int) {
	g := m.gate(key)
	for range n {
		g <- struct{}{}
	}
}

// asked returns how many requests had tools and this text in the last prompt.
func (m *stubModel) asked(prompt string) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.requests {
		if p, _ := r.prompt(); len(r.Tools) > 0 && strings.Contains(p, prompt) {
			n++
		}
	}
	return n
}

// prompt returns the user's last text and the results of tools since then.
func (r modelRequest) prompt() (text string, results []string) {
	for _, msg := range r.Messages {
		switch msg.Role {
		case "user":
			text, results = strings.TrimSpace(msg.text()), nil
		case "tool":
			results = append(results, msg.text())
		}
	}
	if len(text) > 1 && text[0] == '"' && text[len(text)-1] == '"' {
		text = text[1 : len(text)-1] // `opencode run` quotes its message
	}
	return text, results
}

// answer is one turn of the model.
type answer struct {
	parts []string        // of its text
	gate  <-chan struct{} // waited for before each part; nil: none
	pace  time.Duration   // between parts
	tool  string          // called behind the text
	args  map[string]any
}

func (m *stubModel) script(r modelRequest) answer {
	text, results := r.prompt()
	if len(r.Tools) == 0 {
		return answer{parts: []string{"A title from the stub"}}
	}
	line, _, _ := strings.Cut(text, "\n")
	word, rest, _ := strings.Cut(line, " ")
	bash := func(command string) answer {
		return answer{tool: "bash", args: map[string]any{"command": command, "description": "Runs what the test asked for"}}
	}
	switch word {
	case "write":
		file, content, _ := strings.Cut(rest, " ")
		switch len(results) {
		case 0:
			return answer{tool: "write", args: map[string]any{"filePath": projectDir + "/" + file, "content": content}}
		case 1:
			return bash("tr a-z A-Z <" + file + " >" + file + ".upper && id -u && cat " + file + ".upper")
		}
		return answer{parts: []string{"Wrote ", file, ", and bash said: ", results[1]}}
	case "bash":
		if len(results) == 0 {
			return bash(strings.TrimSpace(strings.TrimPrefix(text, "bash ")))
		}
		return answer{parts: []string{"bash said: ", results[0]}}
	case "slow":
		key, count, _ := strings.Cut(rest, " ")
		n, _ := strconv.Atoi(count)
		a := answer{gate: m.gate(key)}
		for i := range n {
			a.parts = append(a.parts, fmt.Sprintf("part%d ", i+1))
		}
		return a
	case "work":
		key, count, _ := strings.Cut(rest, " ")
		n, _ := strconv.Atoi(count)
		i := len(results) + 1
		if i > n {
			return answer{parts: []string{"Worked ", key}}
		}
		a := bash(workStep(key, i))
		a.pace = 40 * time.Millisecond
		for w := range 5 {
			a.parts = append(a.parts, fmt.Sprintf("%s/%d.%d ", key, i, w))
		}
		return a
	}
	return answer{parts: []string{"You said: ", line}}
}

// workStep is what step i of `work KEY N` runs: a file that holds its number and
// the time, a file that every step changes, and a commit of both. Whoever finds
// the commit must find the files.
func workStep(key string, i int) string {
	return fmt.Sprintf(`set -e; test -d work/.git || git init -q work; cd work
t=$(date +%%s.%%N); echo "%[1]s %[2]d $t" > %[1]s-%[2]d.txt; echo "%[1]s %[2]d $t" >> log.txt
git add -A; git -c user.name=agent -c user.email=agent@example.com commit -qm "%[1]s %[2]d"; echo "done %[1]s %[2]d $t"`, key, i)
}

// slowAnswer is what a whole slow answer of n parts reads.
func slowAnswer(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "part%d ", i+1)
	}
	return strings.TrimSpace(b.String())
}

func (m *stubModel) complete(w http.ResponseWriter, r *http.Request) {
	var req modelRequest
	body, err := io.ReadAll(io.LimitReader(r.Body, 16<<20))
	if err == nil {
		err = json.Unmarshal(body, &req)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	req.auth = r.Header.Get("Authorization")
	m.mu.Lock()
	m.requests = append(m.requests, req)
	id := fmt.Sprintf("call_%d", len(m.requests))
	m.mu.Unlock()
	if req.auth != "Bearer "+modelKey {
		http.Error(w, `{"error":{"message":"wrong key"}}`, http.StatusUnauthorized)
		return
	}
	a := m.script(req)
	send, done := m.whole(w), func(string) {}
	if req.Stream {
		send, done = m.stream(w)
	}
	text := func() bool {
		for i, part := range a.parts {
			var pace <-chan time.Time
			if i > 0 && a.pace > 0 {
				pace = time.After(a.pace)
			}
			if !received(r.Context(), a.gate) || !received(r.Context(), pace) {
				return false
			}
			send(map[string]any{"role": "assistant", "content": part}, "")
		}
		return true
	}
	if a.tool != "" {
		args, _ := json.Marshal(a.args)
		if req.Stream && !text() {
			return
		}
		send(map[string]any{"role": "assistant", "tool_calls": []any{map[string]any{
			"index": 0, "id": id, "type": "function",
			"function": map[string]any{"name": a.tool, "arguments": string(args)},
		}}}, "tool_calls")
		done("tool_calls")
		return
	}
	if !req.Stream {
		send(map[string]any{"role": "assistant", "content": strings.Join(a.parts, "")}, "stop")
		return
	}
	if text() {
		done("stop")
	}
}

// received waits for c unless it is nil, and returns false if ctx ends first.
func received[T any](ctx context.Context, c <-chan T) bool {
	if c == nil {
		return true
	}
	select {
	case <-c:
		return true
	case <-ctx.Done():
		return false
	}
}

func (m *stubModel) chunk(object, field string, message map[string]any, reason string) []byte {
	choice := map[string]any{"index": 0, field: message, "finish_reason": nil}
	if reason != "" {
		choice["finish_reason"] = reason
	}
	b, _ := json.Marshal(map[string]any{
		"id": "chatcmpl-stub", "object": object, "created": 1, "model": "stub-1", "choices": []any{choice},
		"usage": map[string]any{"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
	})
	return b
}

func (m *stubModel) whole(w http.ResponseWriter) func(map[string]any, string) {
	return func(message map[string]any, reason string) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(m.chunk("chat.completion", "message", message, reason))
	}
}

func (m *stubModel) stream(w http.ResponseWriter) (send func(map[string]any, string), done func(string)) {
	w.Header().Set("Content-Type", "text/event-stream")
	control := http.NewResponseController(w)
	write := func(data []byte) {
		_, _ = fmt.Fprintf(w, "data: %s\n\n", data)
		_ = control.Flush()
	}
	send = func(delta map[string]any, _ string) {
		write(m.chunk("chat.completion.chunk", "delta", delta, ""))
	}
	return send, func(reason string) {
		write(m.chunk("chat.completion.chunk", "delta", map[string]any{}, reason))
		write([]byte("[DONE]"))
	}
}
